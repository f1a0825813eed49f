def why_not():
    return "not built yet"
def available():
    return False

