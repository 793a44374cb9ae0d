"""Makes `small_tokenizers` importable when this folder is run alone."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
