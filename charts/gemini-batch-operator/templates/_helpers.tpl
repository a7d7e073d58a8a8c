{{- define "gbo.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* 44 characters: with the longest suffix, -controller-metrics, the name of a Service has the 63 that it may have. */}}
{{- define "gbo.fullname" -}}
{{- $name := include "gbo.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 44 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 44 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 44 | trimSuffix "-" -}}
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
app.kubernetes.io/name: "{{ include "gbo.name" $top }}"
app.kubernetes.io/instance: "{{ $top.Release.Name }}"
app.kubernetes.io/component: "{{ index . 1 }}"
app.kubernetes.io/part-of: gemini-batch-operator
app.kubernetes.io/managed-by: "{{ $top.Release.Service }}"
app.kubernetes.io/version: {{ $top.Chart.AppVersion | quote }}
helm.sh/chart: "{{ printf "%s-%s" $top.Chart.Name $top.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}"
{{- end -}}

{{/* What tells the pods of one Deployment from all others. It may not change between versions of the chart. Called with
(list . "component"). */}}
{{- define "gbo.selector" -}}
{{- $top := index . 0 -}}
app.kubernetes.io/name: "{{ include "gbo.name" $top }}"
app.kubernetes.io/instance: "{{ $top.Release.Name }}"
app.kubernetes.io/component: "{{ index . 1 }}"
{{- end -}}

{{- define "gbo.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The name of what receives callbacks: of its Service, and of its Deployment. */}}
{{- define "gbo.receiver" -}}
{{- printf "%s-receiver" (include "gbo.fullname" .) -}}
{{- end -}}

{{/* The components that are Deployments of their own, with a space between. */}}
{{- define "gbo.components" -}}
controller{{ if and .Values.callbacks (eq .Values.mode "split") }} receiver{{ end }}
{{- end -}}

{{/* "true" if the receiver is one of them, with an account of its own; else nothing. */}}
{{- define "gbo.receiverApart" -}}
{{- if has "receiver" (splitList " " (include "gbo.components" .)) -}}true{{- end -}}
{{- end -}}

{{/* The port of the receiver's Service. */}}
{{- define "gbo.receiverPort" -}}
{{- .Values.receiver.service.port | default (ternary 443 80 (not (empty .Values.receiver.tls.secretName))) | int64 -}}
{{- end -}}

{{/* The component whose pods receive callbacks. */}}
{{- define "gbo.receivingComponent" -}}
{{- ternary "controller" "receiver" (eq .Values.mode "combined") -}}
{{- end -}}

{{/* The external URL, checked. */}}
{{- define "gbo.externalURL" -}}
{{- $url := .Values.receiver.externalURL -}}
{{- if not $url -}}
{{- fail "receiver.externalURL is missing: the address at which Gemini reaches the callback receiver from the internet, for example https://batch-callbacks.example.com. Set it with --set receiver.externalURL=..., and expose the receiver there (receiver.ingress, receiver.httpRoute, or receiver.service.type=LoadBalancer). Or start without callbacks, which needs no address: --set callbacks=false" -}}
{{- end -}}
{{- $parts := urlParse $url -}}
{{- if not (or (eq $parts.scheme "https") (and (eq $parts.scheme "http") .Values.receiver.allowInsecureURL)) -}}
{{- fail (printf "receiver.externalURL is %s, but callbacks cross the internet: make it https://... For tests inside one cluster http is permitted by receiver.allowInsecureURL=true" $url) -}}
{{- end -}}
{{- if or (not $parts.hostname) $parts.query $parts.fragment $parts.userinfo -}}
{{- fail (printf "receiver.externalURL is %s: it must name a host, and have no user, query or fragment, for example https://batch-callbacks.example.com" $url) -}}
{{- end -}}
{{- $url -}}
{{- end -}}

{{- define "gbo.externalHost" -}}
{{- (urlParse (include "gbo.externalURL" .)).hostname -}}
{{- end -}}

{{/* Where the receiver's paths begin: an external URL may have a path of its own. */}}
{{- define "gbo.externalPath" -}}
{{- printf "%s/v1/callbacks" ((urlParse (include "gbo.externalURL" .)).path | trimSuffix "/") -}}
{{- end -}}

{{/* Who works in several namespaces can't find out by itself which cluster this is. */}}
{{- define "gbo.clusterID" -}}
{{- if and .Values.watchNamespaces (not .Values.clusterID) -}}
{{- fail "clusterID is missing: with watchNamespaces the operator can't read the UID of kube-system, which identifies the cluster otherwise. Choose a name that no other cluster with the same Gemini project has, for example --set clusterID=prod-eu, and never change it while jobs are under way" -}}
{{- end -}}
{{- .Values.clusterID -}}
{{- end -}}

{{/* Timings under which two could lead at once, and a key that nobody may use: the operator would not start. */}}
{{- define "gbo.checked" -}}
{{- $lease := .Values.lease -}}
{{- if not (and (lt (int64 $lease.retrySeconds) (int64 $lease.renewDeadlineSeconds)) (lt (int64 $lease.renewDeadlineSeconds) (int64 $lease.seconds))) -}}
{{- fail "lease.retrySeconds must be less than lease.renewDeadlineSeconds, and that less than lease.seconds: else two controllers could lead at once" -}}
{{- end -}}
{{- if le (int64 .Values.resendGraceSeconds) (add 180 (int64 $lease.seconds)) -}}
{{- fail "resendGraceSeconds must be more than 180 + lease.seconds: a create that is still on its way could be sent again" -}}
{{- end -}}
{{- if and (hasPrefix "http://" .Values.gemini.baseURL) (not .Values.gemini.allowInsecure) -}}
{{- fail "gemini.baseURL is not https: API keys would cross the network in the clear. gemini.allowInsecure=true permits it for the simulator" -}}
{{- end -}}
{{- range $label := list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" -}}
{{- if hasKey $.Values.podLabels $label -}}
{{- fail (printf "podLabels may not have %s: by it the Deployments find their pods" $label) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.defaultCredential.namespaces (not .Values.defaultCredential.secretName) -}}
{{- fail "defaultCredential.namespaces says who may use the operator's own API key, but there is none: name its Secret in defaultCredential.secretName" -}}
{{- end -}}
{{- end -}}
