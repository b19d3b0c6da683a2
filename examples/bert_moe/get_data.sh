#!/usr/bin/env bash
EXAMPLE=bert_moe exec bash "$(dirname "${BASH_SOURCE[0]}")/../common/get_data.sh" "$@"
