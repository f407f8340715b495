"""The demonstration study: the IndexTTS-2 workload, small, on a Korean corpus that it makes itself."""
