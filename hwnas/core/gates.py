"""What selects the parts of a super-net that run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Gates = Mapping[str, Any]
"""Choice key -> weight vector [options], numpy or torch. Options at zero are not
executed.
"""

Probes = Mapping[str, Sequence[int]]
"""Choice key -> positions of options with weight zero that need a gradient anyway."""
