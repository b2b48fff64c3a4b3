"""The server: an artefact behind HTTP, in the Open Inference Protocol and in plain JSON. Its extra is `serve`.

From the bottom: `settings`; `body`, JSON without trust; `tensors`, the protocol's; `columns`, raw ones of them;
`requests`, what a request asks for; `oip` and `plain`, its two spellings; `examples`; `model`, loaded, checked, warmed
up and replaced; `metrics`; `service`, all of it together; `app`, the routes; `worker` and `command`, the processes.
"""
