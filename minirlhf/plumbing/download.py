"""Fetching one file from the web so that a broken line costs little: resumed, retried, checked."""
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request

from tqdm import tqdm

from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import writing

TIMEOUT = 30  # seconds without a byte until the connection counts as broken


def sha256_of(path):
    """SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url, path, sha256=None, tries=3, wait=1.0):
    """Bring `url` to `path` and return its SHA-256; a file that is there is not fetched again.

    The bytes go to `path`.part first, and a later try, or a later run, goes on where that file
    ends. `path` itself appears only when the length that the server announced, and `sha256` where
    it is given, are right. So whoever finds `path` may trust it.
    `tries`: attempts where the connection breaks or the server is busy, first `wait` seconds apart,
    then twice that, and so on. An answer such as "not found" is final at once.
    Raises UserError with url and path when the file can't be had or isn't the expected one.
    """
    if not os.path.exists(path):
        try:
            urllib.request.Request(url)
        except ValueError as error:
            raise UserError(f"{url}: expected a web address, https://... ({error}); check the "
                            "address, or give a local copy with --source") from None
        with writing(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        for attempt in range(tries):
            try:
                fetch_rest(url, path + ".part")
                break
            except urllib.error.HTTPError as error:
                problem = f"the server answered {error.code} {error.reason}"
                if error.code == 416:  # the server has nothing beyond our bytes: begin anew
                    os.remove(path + ".part")
                elif error.code < 500 and error.code not in (408, 429):
                    raise UserError(f"{url}: {problem}; check the address, or give a local copy "
                                    "with --source") from None
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt == tries - 1:
                raise UserError(f"{url}: not fetched in {tries} tries, the last time: {problem}; "
                                "check the network and run again (it goes on where it stopped), "
                                "or give a local copy with --source")
            time.sleep(wait * 2 ** attempt)
    found = path if os.path.exists(path) else path + ".part"
    digest = sha256_of(found)
    if sha256 and digest != sha256.lower():
        os.remove(found)
        raise UserError(f"{path}: expected SHA-256 {sha256}, found {digest}; the file is removed, "
                        "run again, and if it stays so, the file at the source has changed")
    os.replace(found, path)
    return digest


def fetch_rest(url, part):
    """Append to the file `part` what `url` has beyond it; OSError if the line breaks off."""
    start = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"User-Agent": "minirlhf", **({"Range": f"bytes={start}-"} if start else {})}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if answer.status != 206:  # a server that ignores Range sends the file from its beginning
            start = 0
        length = answer.headers["Content-Length"]
        total = start + int(length) if length else None  # bytes
        name = os.path.basename(part).removesuffix(".part")
        with open(part, "ab" if start else "wb") as file, tqdm(
                total=total, initial=start, unit="B", unit_scale=True, desc=name,
                disable=None) as bar:  # None: no bar where stderr is no terminal
            while block := answer.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    size = os.path.getsize(part)
    if total is not None and size != total:
        raise OSError(f"the connection broke after {size:,} of {total:,} bytes")
