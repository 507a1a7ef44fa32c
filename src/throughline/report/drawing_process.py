"""A process that draws some of a run's figures; run, never imported, by `drawings`.

`python -m throughline.report.drawing_process RUN` reads their names as a JSON list, and writes what it has drawn as JSON.
"""

import json
import sys

from throughline.report.drawings import draw_figures
from throughline.run_dir import RunDir

if __name__ == "__main__":
    json.dump(draw_figures(RunDir(sys.argv[1]), json.load(sys.stdin)), sys.stdout)
