"""Formulas as MathML: every current browser draws it, with no script, no font to fetch and no network."""

import re
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

log = logging.getLogger(__name__)

ALIKE = {"aligned": "split", "align": "align*", "gather": "gather*"}  # the converter's names, without its own numbers
BARS = re.compile(r"<mo>(&#x02016;|&#x0007C;|\||‖)")  # bare bars would stretch to the height of their line


def mathml(latex: str, display: str) -> str:
    """Translate one formula: LaTeX, "inline" or "block" → a <math> element. Raises ValueError if it cannot."""
    tidy = re.sub(r"\\(begin|end)\{(\w+)\}", lambda m: rf"\{m[1]}{{{ALIKE.get(m[2], m[2])}}}", latex.strip())
    try:
        markup = convert(tidy, display=display)
        ElementTree.fromstring(markup)
    except Exception as error:  # the converter raises many kinds, some of them bare
        raise ValueError(f"{type(error).__name__} {error}".strip()) from error
    if unknown := re.findall(r">\s*(\\[^<]+)<", markup):
        raise ValueError(f"unknown command {', '.join(unknown)}")
    return BARS.sub(r'<mo stretchy="false">\1', markup)


def _formula(node: nodes.Element, display: str) -> str:
    try:
        return mathml(node.astext(), display)
    except ValueError as error:
        log.warning("formula %r has no MathML: %s", node.astext(), error, location=node)
        return f"<code>{nodes.unescape(node.astext())}</code>"


def visit_inline(self, node: nodes.math) -> None:
    self.body.append(self.starttag(node, "span", "", CLASS="math notranslate nohighlight"))
    self.body.append(_formula(node, "inline") + "</span>")
    raise nodes.SkipNode


def visit_block(self, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", "", CLASS="math notranslate nohighlight"))
    if node.get("number"):
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(_formula(node, "block") + "</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
