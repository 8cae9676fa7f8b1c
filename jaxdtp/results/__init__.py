"""What a run tells: records, statistics over seeds, figures, trackers."""
