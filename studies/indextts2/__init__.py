"""Fine-tuning of the IndexTTS-2 GPT on paired manifests: `workload = "studies.indextts2:IndexTTS2"`."""

from studies.indextts2.workload import IndexTTS2

__all__ = ["IndexTTS2"]
