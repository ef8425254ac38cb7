def unavailable(device_type=None, dtype=None):
    return "not built"
