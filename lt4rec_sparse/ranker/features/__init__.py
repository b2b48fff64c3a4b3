"""The schema of a click log, and the one code that turns its raw values into ids for training and for serving."""

from lt4rec_sparse.ranker.features.encoder import EncodedFeatures, FeatureEncoder, Field
from lt4rec_sparse.ranker.features.records import SchemaError
from lt4rec_sparse.ranker.features.schema import (
    Column,
    Derived,
    Files,
    Group,
    History,
    Join,
    Schema,
    Slice,
    Split,
    Task,
    Time,
)

__all__ = [
    "Column",
    "Derived",
    "EncodedFeatures",
    "FeatureEncoder",
    "Field",
    "Files",
    "Group",
    "History",
    "Join",
    "Schema",
    "SchemaError",
    "Slice",
    "Split",
    "Task",
    "Time",
]
