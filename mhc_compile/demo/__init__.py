"""The demo: train one small Llama twice, plain and with backend="mhc", and compare. `python -m mhc_compile demo`."""
