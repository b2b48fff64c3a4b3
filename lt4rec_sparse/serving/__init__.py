"""Serving: the artefact on disk and the ranker that scores from it. Needs no training code."""

from lt4rec_sparse.serving.artefact import ArtefactError, load, save
from lt4rec_sparse.serving.ranker import Ranker

__all__ = ["ArtefactError", "Ranker", "load", "save"]
