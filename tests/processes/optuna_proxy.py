"""Optuna's gRPC proxy, before the database at a URL, on a port of this machine."""

import sys
import warnings

from optuna.storages import RDBStorage, run_grpc_proxy_server

warnings.simplefilter("ignore")  # it is experimental
run_grpc_proxy_server(RDBStorage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
