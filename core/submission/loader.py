# The packed program's loader, its first part. PARTS: this text, the entry, then names and texts of modules in turn;
# FILE: the program's own path. linecache and inspect, which Triton and torch.compile read, find every module's text
# under a file name inside the program's own, where no file can be.
import importlib.util
import linecache
import os
import sys

FILE = os.path.abspath(FILE)  # noqa: F821
TEXTS = dict(zip(PARTS[2::2], PARTS[3::2], strict=True))  # noqa: F821


class Packed:
    def find_spec(self, name, path=None, target=None):
        package = any(other.startswith(name + ".") for other in TEXTS)
        if name in TEXTS or package:
            place = FILE + "/" + name.replace(".", "/") + ".py"
            return importlib.util.spec_from_loader(name, self, origin=place, is_package=package)

    def create_module(self, spec):
        pass

    def exec_module(self, module):
        place, text = module.__spec__.origin, self.get_source(module.__name__)
        module.__file__ = place
        linecache.cache[place] = len(text), None, text.splitlines(True), place
        exec(compile(text, place, "exec"), module.__dict__)

    def get_source(self, name):
        return TEXTS.get(name, "")


sys.meta_path.insert(0, Packed())
if __name__ == "__main__":
    exec(compile(PARTS[1], FILE + "/start.py", "exec"))  # noqa: F821
