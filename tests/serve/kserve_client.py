"""Sends tensors from stdin to a server by kserve's REST client, as JSON and as bytes; prints what it reads.

It runs in an environment of its own, without this package.
"""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

DTYPES = {"INT64": np.int64, "FP64": np.float64, "BYTES": np.object_}


def inputs(entries: list[dict], is_binary: bool) -> list[InferInput]:
    found = []
    for entry in entries:
        missing = [value is None for value in entry["data"]]
        values = [value if value is not None else 0 for value in entry["data"]]
        values = [text.encode() for text in values] if entry["datatype"] == "BYTES" else values
        found.append(InferInput(entry["name"], entry["shape"], entry["datatype"]))
        found[-1].set_data_from_numpy(np.array(values, DTYPES[entry["datatype"]]), binary_data=is_binary)
        if any(missing):
            found.append(InferInput(f"{entry['name']}.present", entry["shape"], "BOOL"))
            found[-1].set_data_from_numpy(~np.array(missing), binary_data=is_binary)
    return found


async def main(url: str) -> dict:
    entries = json.load(sys.stdin)
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    answers = {
        "health": [
            await client.is_server_live(url),
            await client.is_server_ready(url),
            await client.is_model_ready(url, "shop"),
        ]
    }
    for name, is_binary in (("json", False), ("binary", True)):
        outputs = [RequestedOutput(task, parameters={"binary_data": is_binary}) for task in ("ctr", "cvr")]
        request = InferRequest("shop", inputs(entries, is_binary), request_id="3", request_outputs=outputs)
        answer = await client.infer(url, request, model_name="shop")
        answers[name] = {output.name: output.as_numpy().tolist() for output in answer.outputs}
    await client.close()
    return answers


print(json.dumps(asyncio.run(main(sys.argv[1]))))  # noqa: T201
