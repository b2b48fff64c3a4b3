"""The one training harness: declared trials, their searches, tuning and jobs, for runs and experiments alike."""
