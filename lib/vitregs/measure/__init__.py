"""Measurements on labelled arrays and on backbones."""
