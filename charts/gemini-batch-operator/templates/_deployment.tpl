{{/* A Deployment of the operator. Called with (dict "top" . "component" "controller"|"receiver"). */}}
{{- define "gbo.deployment" -}}
{{- $top := .top -}}
{{- $component := .component -}}
{{- $values := index $top.Values $component -}}
{{- $controls := eq $component "controller" -}}
{{- $combined := eq $top.Values.mode "combined" -}}
{{- $receives := and $top.Values.callbacks (or $combined (not $controls)) -}}
{{- include "gbo.checked" $top -}}
{{- with $top.Values -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: "{{ include "gbo.fullname" $top }}-{{ $component }}"
  namespace: "{{ $top.Release.Namespace }}"
  labels:
    {{- include "gbo.labels" (list $top $component) | nindent 4 }}
spec:
  replicas: {{ $values.replicas }}
  # The new one is there before the old one goes.
  strategy:
    rollingUpdate:
      maxUnavailable: 0
      maxSurge: 1
  selector:
    matchLabels:
      {{- include "gbo.selector" (list $top $component) | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "gbo.labels" (list $top $component) | nindent 8 }}
        {{- with .podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      annotations:
        kubectl.kubernetes.io/default-container: operator
        {{- with .podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      serviceAccountName: "{{ $controls | ternary (include "gbo.controllerAccount" $top) (include "gbo.receiverAccount" $top) }}"
      # Variables that Kubernetes would make of Services' names could be taken for flags (GBO_...).
      enableServiceLinks: false
      {{- with .imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .priorityClassName }}
      priorityClassName: {{ . | quote }}
      {{- end }}
      {{- with .nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      topologySpreadConstraints:
        {{- if .topologySpreadConstraints }}
        {{- toYaml .topologySpreadConstraints | nindent 8 }}
        {{- else }}
        {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
        - topologyKey: {{ . }}
          maxSkew: 1
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "gbo.selector" (list $top $component) | nindent 14 }}
          # While pods roll, those that go do not count.
          matchLabelKeys: [pod-template-hash]
        {{- end }}
        {{- end }}
      terminationGracePeriodSeconds: {{ .terminationGracePeriodSeconds }}
      securityContext:
        {{- toYaml .podSecurityContext | nindent 8 }}
      containers:
        - name: operator
          image: {{ include "gbo.image" $top | quote }}
          imagePullPolicy: {{ .image.pullPolicy }}
          args:
            - run
            - --role={{ $combined | ternary "all" $component }}
            - --callbacks={{ .callbacks | ternary "on" "off" }}
            {{- if .callbacks }}
            - {{ printf "--external-url=%s" (include "gbo.externalURL" $top) | quote }}
            {{- if .receiver.allowInsecureURL }}
            - --allow-insecure-callbacks
            {{- end }}
            {{- end }}
            - --key-ring-secret={{ .keyRing.secretName }}
            {{- with .gemini.baseURL }}
            - {{ printf "--gemini-base-url=%s" . | quote }}
            {{- end }}
            {{- if .gemini.allowInsecure }}
            - --allow-insecure-upstream
            {{- end }}
            {{- if $controls }}
            {{- with include "gbo.clusterID" $top }}
            - --cluster-id={{ . }}
            {{- end }}
            {{- with .watchNamespaces }}
            - --watch-namespaces={{ join "," . }}
            {{- end }}
            {{- if .pauseSubmissions }}
            - --pause-submissions
            {{- end }}
            {{- with .defaultCredential }}
            {{- if .secretName }}
            - --default-credential-secret={{ .secretName }}
            - --default-credential-key={{ .secretKey }}
            {{- with .namespaces }}
            - {{ printf "--default-credential-namespaces=%s" (join "," .) | quote }}
            {{- end }}
            {{- end }}
            {{- end }}
            - --lease-name={{ .lease.name }}
            - --lease-seconds={{ int64 .lease.seconds }}
            - --lease-renew-deadline-seconds={{ int64 .lease.renewDeadlineSeconds }}
            - --lease-retry-seconds={{ int64 .lease.retrySeconds }}
            - --resend-grace-seconds={{ int64 .resendGraceSeconds }}
            - --max-active-batches={{ int64 .limits.maxActiveBatches }}
            - --concurrency={{ int64 .limits.concurrency }}
            {{- with .limits.maxInputBytes }}
            - --max-input-bytes={{ int64 . }}
            {{- end }}
            - --transfers={{ int64 .limits.transfers }}
            {{- with .objectStores.endpoints }}
            - {{ printf "--object-store-endpoints=%s" (join "," .) | quote }}
            {{- end }}
            {{- with .objectStores.ownIdentityNamespaces }}
            - {{ printf "--own-identity-namespaces=%s" (join "," .) | quote }}
            {{- end }}
            {{- range .objectStores.mappedDirectories }}
            - --mapped-directories={{ .name }}=/mapped/{{ .name }}
            {{- end }}
            {{- with .sweepSeconds }}
            - --sweep-seconds={{ int64 . }}
            {{- end }}
            {{- end }}
            {{- if $receives }}
            - --listen=0.0.0.0:8080
            - --callback-schemes={{ join "," .receiver.schemes }}
            {{- with .receiver.audience }}
            - {{ printf "--callback-audience=%s" (join "," .) | quote }}
            {{- end }}
            {{- if .receiver.tls.secretName }}
            - --tls-cert-file=/tls/tls.crt
            - --tls-key-file=/tls/tls.key
            {{- end }}
            {{- end }}
            - --admin-listen=0.0.0.0:8081
            - {{ printf "--log-level=%s" .log.level | quote }}
            - --log-format={{ .log.format }}
            {{- range .extraArgs }}
            - {{ . | quote }}
            {{- end }}
          env:
            - name: GBO_NAMESPACE
              valueFrom:
                fieldRef:
                  fieldPath: metadata.namespace
            {{- with .extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            {{- if $receives }}
            - name: callbacks
              containerPort: 8080
            {{- end }}
            - name: admin
              containerPort: 8081
          # Whoever waits to lead is ready as well.
          readinessProbe:
            httpGet:
              path: /readyz
              port: admin
            periodSeconds: 5
          livenessProbe:
            httpGet:
              path: /healthz
              port: admin
            periodSeconds: 10
            failureThreshold: 6
          {{- if $receives }}
          # Callbacks still come here until the Service has noticed.
          lifecycle:
            preStop:
              sleep:
                seconds: 5
          {{- end }}
          resources:
            {{- toYaml $values.resources | nindent 12 }}
          securityContext:
            {{- toYaml .securityContext | nindent 12 }}
          {{- $tls := and $receives .receiver.tls.secretName }}
          {{- if or $controls $tls .extraVolumeMounts }}
          volumeMounts:
            {{- if $controls }}
            - name: temporary
              mountPath: /tmp
            {{- range .objectStores.mappedDirectories }}
            - name: "mapped-{{ .name }}"
              mountPath: "/mapped/{{ .name }}"
              readOnly: true
            {{- end }}
            {{- end }}
            {{- if $tls }}
            - name: tls
              mountPath: /tls
              readOnly: true
            {{- end }}
            {{- with .extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          {{- end }}
      {{- if or $controls $tls .extraVolumes }}
      volumes:
        {{- if $controls }}
        - name: temporary
          emptyDir:
            sizeLimit: "{{ .controller.temporaryStorage }}"
        {{- range .objectStores.mappedDirectories }}
        - name: "mapped-{{ .name }}"
          {{- toYaml .volume | nindent 10 }}
        {{- end }}
        {{- end }}
        {{- if $tls }}
        - name: tls
          secret:
            secretName: "{{ .receiver.tls.secretName }}"
        {{- end }}
        {{- with .extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- end }}
{{- end -}}
{{- end -}}
