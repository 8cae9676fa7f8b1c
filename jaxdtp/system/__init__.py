"""The machine around a run: terminal, signals, files and object storage, compiled programs, and how errors are told."""
