"""Trackers: where the course of trainings can be watched while it goes on, such as TensorBoard or MLflow."""

from lt4rec_sparse.recsys.harness.trackers.tracking import (
    NONE,
    TRACKERS,
    Course,
    Tracker,
    Tracking,
    check_tracker,
    figures,
    flat,
    tracking,
)

__all__ = ["NONE", "TRACKERS", "Course", "Tracker", "Tracking", "check_tracker", "figures", "flat", "tracking"]
