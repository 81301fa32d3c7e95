import contextlib, hashlib, json, os
from pathlib import Path
def file_digest(path, algorithm="sha256"):
    d = hashlib.new(algorithm)
    with Path(path).open("rb") as f:
        while b := f.read(1 << 20): d.update(b)
    return d.hexdigest()
@contextlib.contextmanager
def write_whole(path):
    path = Path(path); path.parent.mkdir(parents=True, exist_ok=True)
    t = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with t.open("wb") as f: yield f
        t.replace(path)
    finally: t.unlink(missing_ok=True)
def write_text(text, path):
    with write_whole(path) as f: f.write(text.encode())
def write_json(content, path):
    write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path)
