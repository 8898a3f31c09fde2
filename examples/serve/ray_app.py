"""An application of Ray Serve: `serve run examples.serve.ray_app:app`; see docs/serving-at-scale.md."""

from minitron.serve.ray import deployment
from minitron.serve.settings import ServeSettings

app = deployment(ServeSettings(("bundled",), threads=4), least=1, most=4, cpus=4)
