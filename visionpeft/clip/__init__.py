"""CLIP: its fast text tower, token layouts, and what all prompt learners share; `learners` has the learners."""
