"""One process that has imported PyTorch, and starts scripts in copies of itself (os.fork). A new interpreter
would import PyTorch again each time, which takes seconds.

It reads a request per line, and answers each with a line:
    {"args", "cwd", "env": one per copy, "stdin", "stdout", "stderr": files}    the numbers of the copies
    {"poll": number}                                                            its status, or null at work
    {"wait": number}                                                            its status once it has ended
"""
import atexit
import gc
import json
import os
import runpy
import sys
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def import_what_scripts_use():
    """The packages that the project's modules import, and those that PyTorch imports when it makes a first
    optimizer (torch._dynamo, which takes more than a second) or shards a first network, but none of the
    project's modules, which each copy imports for itself, as a new interpreter would."""
    sys.path[0] = ROOT                                      # not tests/helpers
    for name in ("sft", "reward_model", "dpo", "ppo", "evaluate", "variants.grpo",
                 "torch._dynamo", "torch.distributed.fsdp", "pytest"):
        __import__(name)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(ROOT + os.sep) and "site-packages" not in file and name != "__main__":
            del sys.modules[name]
    del sys.path[0]


def become(request, environment):
    """Take over a request's folder, environment, streams and arguments, and run its script."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(environment)
    for stream, (name, flags) in enumerate((("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY | os.O_APPEND),
                                            ("stderr", os.O_WRONLY | os.O_APPEND))):
        os.dup2(os.open(request[name], flags), stream)
    what, *sys.argv[1:] = request["args"]
    for folder in reversed(environment.get("PYTHONPATH", "").split(os.pathsep)):
        sys.path.insert(0, folder)
    if what == "-m":
        module = sys.argv.pop(1)
        sys.path.insert(0, os.getcwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = what
        sys.path.insert(0, os.path.dirname(what))
        runpy.run_path(what, run_name="__main__")


def serve():
    """Wait for requests, and answer them. Returns (request, environment) in each copy."""
    for line in sys.stdin:
        request = json.loads(line)
        if "args" in request:
            answer = []
            for environment in request["env"]:
                answer.append(os.fork())
                if answer[-1] == 0:
                    return request, environment
        else:
            [(how, number)] = request.items()
            ended, status = os.waitpid(number, os.WNOHANG if how == "poll" else 0)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), flush=True)
    os._exit(0)


def status_of(run, *arguments):
    """The status with which a function's exception would end an interpreter, which prints it."""
    try:
        run(*arguments)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_in_this_copy(request, environment):
    """Run the script of a request, and end this process with its status."""
    status = status_of(become, request, environment)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)        # an interpreter would free all that it has imported, which takes a second


if __name__ == "__main__":
    import_what_scripts_use()
    gc.freeze()             # else a copy's collector writes to every object, and each page has to be copied
    run_in_this_copy(*serve())
