"""The paper's claims, their rules, and what stored arrays say of each."""
