"""The paper's tables, comparisons and figures."""
