{{- define "ssd.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "ssd.selector" -}}
app.kubernetes.io/name: ssd-on-triton
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "ssd.labels" -}}
{{ include "ssd.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Of a dict with `image` and `default` (a tag). */}}
{{- define "ssd.reference" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .default }}
{{- end -}}
{{- end }}

{{- define "ssd.image" -}}
{{ include "ssd.reference" (dict "image" .Values.image "default" .Chart.AppVersion) }}
{{- end }}

{{/* The gateway is no server: it has another name, so that Services, budgets and policies of the servers leave it out. */}}
{{- define "ssd.gatewaySelector" -}}
app.kubernetes.io/name: ssd-gateway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "ssd.gatewayLabels" -}}
{{ include "ssd.labels" . | replace "app.kubernetes.io/name: ssd-on-triton" "app.kubernetes.io/name: ssd-gateway" }}
{{- end }}

{{- define "ssd.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (ternary (include "ssd.name" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{/* The servers read the bucket themselves; with the sync container only that does. */}}
{{- define "ssd.readsS3" -}}
{{- if and (not .Values.plan.enabled) (eq .Values.models.source "s3") (not .Values.models.s3.sync.enabled) }}yes{{ end }}
{{- end }}
{{- define "ssd.syncsS3" -}}
{{- if and (not .Values.plan.enabled) (eq .Values.models.source "s3") .Values.models.s3.sync.enabled }}yes{{ end }}
{{- end }}

{{- define "ssd.s3env" -}}
{{- with .Values.models.s3.region }}
- { name: AWS_DEFAULT_REGION, value: {{ . | quote }} }
- { name: AWS_REGION, value: {{ . | quote }} }
{{- end }}
{{- with .Values.models.s3.secretName }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom: { secretKeyRef: { name: {{ $.Values.models.s3.secretName }}, key: {{ . }} } }
{{- end }}
{{- end }}
{{- end }}

{{- define "ssd.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
capabilities: { drop: [ALL] }
{{- end }}

{{/* What values.schema.json cannot say: values that need each other. */}}
{{- define "ssd.check" -}}
{{- $models := .Values.models }}
{{- if not .Values.plan.enabled }}
{{- if and (eq $models.source "pvc") (not $models.pvc.claimName) }}
{{- fail "models.source is pvc, so models.pvc.claimName must name the claim with the repository" }}
{{- end }}
{{- if and (eq $models.source "image") (not $models.image.reference) }}
{{- fail "models.source is image, so models.image.reference must name the image with the repository" }}
{{- end }}
{{- if and (eq $models.source "s3") (not $models.s3.url) }}
{{- fail "models.source is s3, so models.s3.url must be set, such as s3://bucket/prefix" }}
{{- end }}
{{- if and (eq $models.source "image") $models.pollSeconds }}
{{- fail "models.pollSeconds has no effect with models.source image: an image never changes; set it to 0" }}
{{- end }}
{{- if and (eq $models.source "s3") $models.s3.sync.enabled (not $models.pollSeconds) }}
{{- fail "models.s3.sync fetches new versions, but with models.pollSeconds 0 no server takes them up; set it to 10 or so" }}
{{- end }}
{{- end }}
{{- if and .Values.plan.enabled (not .Values.gpus) }}
{{- fail "plan.enabled builds TensorRT plans, which needs a GPU: set gpus to 1" }}
{{- end }}
{{- if and .Values.plan.enabled (eq .Values.plan.cache.kind "pvc") (not .Values.plan.cache.claimName) }}
{{- fail "plan.cache.kind is pvc, so plan.cache.claimName must name the claim" }}
{{- end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- fail "autoscaling.minReplicas is larger than autoscaling.maxReplicas" }}
{{- end }}
{{- end }}

{{/* What the init container builds, or the sync container fetches, lies one folder deeper: what is unfinished is beside it. */}}
{{- define "ssd.repository" -}}
{{- if include "ssd.readsS3" . -}}
{{ .Values.models.s3.url }}
{{- else if or .Values.plan.enabled (include "ssd.syncsS3" .) -}}
/models/current
{{- else -}}
/models
{{- end -}}
{{- end }}
