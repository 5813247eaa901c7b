"""Tables that somebody else measured: read from their files, and compared with ours."""
