"""`python -m editar_hf.commands`: the `editar-hf` command, for launchers that start Python modules."""

import sys

from . import main


sys.exit(main())
