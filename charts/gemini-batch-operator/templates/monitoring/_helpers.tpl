{{/* Whether there are callbacks, and so a receiver. "true" or nothing. */}}
{{- define "gbo.monitoring.callbacks" -}}
{{- if .Values.callbacks -}}true{{- end -}}
{{- end -}}

{{/* The pods with metrics, whatever their component. Called with the root. */}}
{{- define "gbo.monitoring.selector" -}}
app.kubernetes.io/name: "{{ include "gbo.name" . }}"
app.kubernetes.io/instance: "{{ .Release.Name }}"
{{- end -}}

{{/* A file with rules, for this release. Called with (list . "file"). */}}
{{- define "gbo.monitoring.rules" -}}
{{- $top := index . 0 -}}
{{- $namespace := $top.Release.Namespace -}}
{{- $runbooks := $top.Values.monitoring.prometheusRule.runbookURL -}}
{{- $rules := $top.Files.Get (index . 1) | replace "NAMESPACE" $namespace | fromYamlArray -}}
{{- range $rules -}}
{{- /* What aggregates has no labels left, and an Alertmanager may route by this one. */ -}}
{{- $_ := set .labels "namespace" $namespace -}}
{{- if $runbooks -}}
{{- $_ := set .annotations "runbook_url" (printf "%s#%s" $runbooks (lower .alert)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $rules -}}
{{- end -}}
