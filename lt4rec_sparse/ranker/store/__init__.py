"""What a request need not bring: features of users and items by key, in one file, looked up in memory."""

from lt4rec_sparse.ranker.store.file import FeatureTable, write_features
from lt4rec_sparse.ranker.store.store import FeatureStore

__all__ = ["FeatureStore", "FeatureTable", "write_features"]
