"""What text asks of a cache: `calibrating` keeps `statistics`, `measuring` prices rungs, `planning` splits bytes."""
