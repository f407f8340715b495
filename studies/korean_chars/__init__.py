"""A language model over the characters of Korean law texts: `workload = "studies.korean_chars:KoreanChars"`."""

from studies.korean_chars.workload import KoreanChars

__all__ = ["KoreanChars"]
