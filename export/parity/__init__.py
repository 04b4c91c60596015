"""The bundle compared with its source."""
