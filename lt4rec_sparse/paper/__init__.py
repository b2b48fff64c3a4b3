"""The paper's tables and figures as declared runs over the floors below."""
