"""MediaPipe's own metadata code, run by .venv-tflite-runtime's Python.

- ``metadata_tools.py show MODEL``: the metadata and the names of the packed files, as JSON.
- ``metadata_tools.py copy FROM TO``: put FROM's metadata and files into the model of
  TO, as ``MetadataPopulator`` does.
- ``metadata_tools.py write MODEL TO``: write new metadata of an object detector, as
  ``MetadataWriter`` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mediapipe.tasks.python.metadata.metadata import MetadataDisplayer, MetadataPopulator
from mediapipe.tasks.python.metadata.metadata_writers.metadata_writer import Labels
from mediapipe.tasks.python.metadata.metadata_writers.object_detector import MetadataWriter

verb, model, *rest = sys.argv[1:]
content = Path(model).read_bytes()
if verb == "show":
    shown = MetadataDisplayer.with_model_file(model)
    print(
        json.dumps(
            {
                "metadata": json.loads(shown.get_metadata_json()),
                "files": shown.get_packed_associated_file_list(),
            }
        )
    )
elif verb == "copy":
    populator = MetadataPopulator.with_model_file(rest[0])
    populator.load_metadata_and_associated_files(content)
    populator.populate()
else:
    writer = MetadataWriter.create_for_models_with_nms(
        bytearray(content), [127.5], [127.5], Labels().add(["red", "blue"])
    )
    Path(rest[0]).write_bytes(writer.populate()[0])
