"""torchrun's agent, which a signal ends without a traceback: by then ranks have reported what became of their work.

`python -m launch.cluster.agent` takes torchrun's arguments.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as ended:
        sys.exit(128 + ended.sigval)
