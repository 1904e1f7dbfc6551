"""Run Optuna's gRPC proxy for the database at a URL, on a local port."""

import sys
import warnings

from optuna.storages import RDBStorage, run_grpc_proxy_server

warnings.simplefilter("ignore")  # it is experimental
run_grpc_proxy_server(RDBStorage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
