"""``python -m milora_vl``."""

import sys

from milora_vl.cli import main

sys.exit(main())
