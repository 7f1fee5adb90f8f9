"""Figures, tables, reports and widgets; shows what the other rooms compute."""
