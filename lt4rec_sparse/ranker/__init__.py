"""Serving: the artefact on disk, and the ranker that scores with it. Needs no training code."""

from lt4rec_sparse.checked_file import ArtefactError
from lt4rec_sparse.ranker.artefact import load, save
from lt4rec_sparse.ranker.ranker import Ranker

__all__ = ["ArtefactError", "Ranker", "load", "save"]
