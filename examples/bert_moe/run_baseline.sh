#!/usr/bin/env bash
EXAMPLE=bert_moe exec bash "$(dirname "${BASH_SOURCE[0]}")/../common/run_baseline.sh" "$@"
