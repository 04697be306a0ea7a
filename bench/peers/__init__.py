"""Other people's quantisers, each in an environment of its own; see `bench.peers.make`."""
