"""What tests do without, since its import takes seconds.

`jsonschema`, which Jupyter's packages import, can check web addresses by a grammar that is compiled at each import of
`rfc3987_syntax`. It does without where that is not installed.
"""

from __future__ import annotations

import sys

sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # its import fails
