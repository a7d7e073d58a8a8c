{{- define "gbo.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* 52 characters leave room for the suffixes in what must be a label: 63 characters. */}}
{{- define "gbo.fullname" -}}
{{- $name := include "gbo.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* For objects without a namespace: two releases of one name, in two namespaces, must not share them. The dot is in
neither part, so no two pairs make the same name. */}}
{{- define "gbo.clusterName" -}}
{{- printf "%s.%s" .Release.Namespace (include "gbo.fullname" .) -}}
{{- end -}}

{{- define "gbo.controllerAccount" -}}
{{- .Values.controller.serviceAccount.name | default (printf "%s-controller" (include "gbo.fullname" .)) -}}
{{- end -}}

{{/* One account for both would be limited by the policy and could not do the controller's work. */}}
{{- define "gbo.receiverAccount" -}}
{{- $name := .Values.receiver.serviceAccount.name | default (printf "%s-receiver" (include "gbo.fullname" .)) -}}
{{- if eq $name (include "gbo.controllerAccount" .) -}}
{{- fail "controller.serviceAccount.name and receiver.serviceAccount.name must differ: the receiver faces the internet and may do less" -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* Called with (list . "component"). */}}
{{- define "gbo.labels" -}}
{{- $top := index . 0 -}}
app.kubernetes.io/name: {{ include "gbo.name" $top }}
app.kubernetes.io/instance: {{ $top.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/part-of: gemini-batch-operator
app.kubernetes.io/managed-by: {{ $top.Release.Service }}
app.kubernetes.io/version: {{ $top.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" $top.Chart.Name $top.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}
