"""The demo: train one small Llama twice, plain and with backend="mhc": `python -m mhc_compile demo`."""
