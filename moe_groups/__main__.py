"""``python -m moe_groups``."""

import sys

from moe_groups.cli import main

sys.exit(main())
