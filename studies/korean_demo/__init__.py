"""The demo study: a small IndexTTS-2 workload on a Korean corpus, and the code that makes the corpus."""
