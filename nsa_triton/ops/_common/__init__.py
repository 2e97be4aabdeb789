"""What several operator families share."""
