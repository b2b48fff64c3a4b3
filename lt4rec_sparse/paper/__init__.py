"""The paper's tables and figures, as declared runs of `recsys`."""
