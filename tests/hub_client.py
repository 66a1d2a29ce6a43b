"""Runs ``timm_gpd.hub`` as often as asked, in one process: huggingface_hub reads HF_ENDPOINT once, on import.

Reads a line of JSON, {"argv", "env", "offline"}, and answers with {"code", "stdout", "stderr"}.
"""

import contextlib
import io
import json
import logging
import os
import sys
import time

import torch
from huggingface_hub import constants

from timm_gpd import hub

torch.set_num_threads(1)
time.sleep = lambda seconds: None  # the client's waits between tries
logging.getLogger('huggingface_hub').setLevel(logging.ERROR)

for line in sys.stdin:
    request = json.loads(line)
    os.environ.update(request['env'])
    constants.HF_HUB_OFFLINE = request['offline']
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = hub.main(request['argv'])
    print(json.dumps({'code': code, 'stdout': stdout.getvalue(), 'stderr': stderr.getvalue()}), flush=True)
