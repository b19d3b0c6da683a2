#!/usr/bin/env bash
EXAMPLE=gpt_moe exec bash "$(dirname "${BASH_SOURCE[0]}")/../common/run_ga.sh" "$@"
